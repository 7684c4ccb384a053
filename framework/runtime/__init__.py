"""What every part may lean on: files, random numbers, records."""
