"""Plugins of serving engines: their FP8 block-scaled MoE, run by ours where it is measured, and by theirs elsewhere.

vllm.py and sglang.py each wrap two methods of one class of their engine and read its layers; swap.py holds what they
share. An engine finds its plugin by an entry point and calls `register`; without the engine that does nothing.
"""
