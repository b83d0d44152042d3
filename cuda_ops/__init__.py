"""The operators: their definition in PyTorch (reference), C++ and CUDA kernels (csrc), the public
functions (ops), and the door `python -m cuda_ops build|check|benchmark`.

May import: torch, torchvision and the standard library; nothing else of this repository.
"""
