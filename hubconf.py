"""For `torch.hub.load(repository, "pipeline", "demo")`."""

from bitdance import load_pipeline as pipeline  # noqa: F401 (an entry of PyTorch's hub)

dependencies = ["torch", "numpy", "PIL", "safetensors", "huggingface_hub", "tqdm"]
