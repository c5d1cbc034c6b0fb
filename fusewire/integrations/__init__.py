"""Serving engines that fusewire runs in.

vllm          register: the plugin that vLLM loads
vllm_options  how it is switched on, and its options
vllm_passes   vLLM's pass manager with fusewire's passes; the report of a model
vllm_faults   ends vLLM's worker after a failed call
"""
