"""rime_pl: train and study multimodal embeddings that rewrite before they embed."""

__version__ = "0.1.0"
