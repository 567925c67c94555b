"""The Mixture-of-Attention method (Wang et al., 2024), free of any host.

Imports torch, einops, safetensors and transformers; knows neither ComfyUI nor diffusers.
"""
