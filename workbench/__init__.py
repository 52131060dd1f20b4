"""The MoE kernel workbench: proves, times and selects implementations of one fused FP8 Mixture-of-Experts layer."""
