"""Adapters on any model: trained functions of frozen weights, by `torch.nn.utils.parametrize`.

An adapter is an `nn.Module` that maps the pre-trained weight to the effective one; its config says how to build it
and where it goes. Here it is put in place, merged, removed, saved and loaded. The model's forward code stays as it is,
so whatever reads `module.weight` can be adapted: linear and convolution layers, embeddings, the transposed `Conv1D` of
Hugging Face models and the `in_proj_weight` of `nn.MultiheadAttention`. The frozen weight is never written to.
"""

from trimtab.finetune.adapter.applied import AdaptedModel, apply_adapter
from trimtab.finetune.adapter.config import AdapterConfig, LoRADelta

__all__ = ["AdaptedModel", "AdapterConfig", "LoRADelta", "apply_adapter"]
