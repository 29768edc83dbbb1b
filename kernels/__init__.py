"""Triton kernels of MeteoRA's mixture of LoRAs. Import them as ``meteora.kernels``, never as a top-level ``kernels``.

This file stays free of imports: transformers 5 takes any importable top-level package named ``kernels`` for the
Hugging Face package of that name and imports it, so nothing here may have a side effect.
"""
