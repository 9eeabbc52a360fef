"""Lets torchvision, whose wheel is built for CUDA, be imported beside the CPU build of torch: vLLM's Llama 4 that sees needs it.

Python runs this file at its start where its folder is in PYTHONPATH.
"""

import torch

LIBRARY = torch.library.Library("torchvision", "FRAGMENT")
for name in ("nms", "qnms"):
    LIBRARY.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
