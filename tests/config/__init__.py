"""Tests of framework/config."""
