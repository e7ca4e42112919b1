"""A short hash of a model's config and weights, to recognise the same model again."""

from __future__ import annotations

import hashlib
import json

import torch
from transformers import PreTrainedModel

_VALUES_OF_A_TENSOR = 64
_ABOUT_THE_FILES = ("_name_or_path", "transformers_version")  # config fields about the saved files, not the model


@torch.no_grad()
def fingerprint(model: PreTrainedModel) -> str:
    """16 hex digits of the SHA-256 of a model's config and weights, independent of where the model was loaded from.

    The hash covers the name, dtype and shape of every tensor and 64 evenly spaced values. This distinguishes a
    fine-tuned model from its base within milliseconds. The memory layout of a tensor does not matter.
    """
    settings = {key: value for key, value in model.config.to_diff_dict().items() if key not in _ABOUT_THE_FILES}
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        if tensor.numel():
            at = torch.linspace(0, tensor.numel() - 1, _VALUES_OF_A_TENSOR, dtype=torch.float64).long()
            places = tuple(place.to(tensor.device) for place in torch.unravel_index(at, tensor.shape))
            values = tensor[places] if places else tensor.reshape(1)
            digest.update(bytes(values.cpu().contiguous().view(torch.uint8).tolist()))
    return digest.hexdigest()[:16]
