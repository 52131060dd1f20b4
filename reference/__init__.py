"""The specification of the layer in plain PyTorch. It imports nothing of ours, and so inherits none of our mistakes."""
