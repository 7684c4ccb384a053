"""The one place that imports every part, so that its registry knows it."""

from __future__ import annotations

import framework.allocation.fidelity
import framework.allocation.learned_policy
import framework.allocation.objectives
import framework.allocation.rewards
import framework.allocation.rules
import framework.allocation.search
import framework.allocation.weighting
import framework.data.digits
import framework.data.fashion_mnist
import framework.data.folder
import framework.data.photos
import framework.data.shards
import framework.engine.optimizers
import framework.engine.schedules
import framework.engine.trackers
import framework.evaluation.distribution_features
import framework.generators.autoregressive
import framework.generators.continuous_ar
import framework.generators.diffusion_objectives
import framework.generators.dit
import framework.generators.masked
import framework.generators.samplers
import framework.losses.discriminators
import framework.losses.extractors.classifiers
import framework.losses.extractors.lpips
import framework.losses.perceptual
import framework.losses.reconstruction
import framework.losses.values
import framework.tasks.fine_tune_decoder
import framework.tasks.train_allocation
import framework.tasks.train_autoencoder
import framework.tasks.train_generator
import framework.tasks.train_tokenizer
import framework.tokenizers.autoencoders.autoencoder_kl
import framework.tokenizers.autoencoders.vqgan
import framework.tokenizers.decoders.mask_token_vit
import framework.tokenizers.encoders.patch_encoder
import framework.tokenizers.encoders.suffix_token_vit
import framework.tokenizers.heads
import framework.tokenizers.masking
import framework.tokenizers.quantizers.finite_scalar_quantizer
import framework.tokenizers.quantizers.gaussian_bottleneck
import framework.tokenizers.quantizers.identity
import framework.tokenizers.quantizers.lookup_free_quantizer
import framework.tokenizers.quantizers.vector_quantizer
import framework.tokenizers.spaces
import framework.tokenizers.tokenizer  # noqa: F401
