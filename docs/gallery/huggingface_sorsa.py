"""Fine-tune a Hugging Face model with SORSA, save the adapter, load it again.

A tiny Llama from a config, with random weights, learns to repeat the first token of a sequence. Only the largest
singular triplets of each linear layer are trained. The adapter is saved alone and put on the same base model again;
merged, the model is saved as any other.
"""

import copy
import tempfile
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from trimtab.finetune import SORSAConfig, apply_adapter, orthonormality_penalty

torch.manual_seed(0)
base = LlamaForCausalLM(
    LlamaConfig(
        vocab_size=16,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        initializer_range=0.2,
    )
)
model = copy.deepcopy(base)
adapters = apply_adapter(model, SORSAConfig(r=8, target_modules="all-linear"))
optimizer = torch.optim.AdamW(adapters.trainable_parameters(), lr=2e-2, weight_decay=0.0)
losses = []
for _ in range(80):
    tokens = torch.randint(16, (32, 1)).expand(-1, 6)
    loss = model(input_ids=tokens, labels=tokens).loss
    optimizer.zero_grad()
    (loss + 4e-4 / 2e-2 * orthonormality_penalty(model)).backward()  # gamma over the learning rate
    optimizer.step()
    losses.append(loss.item())
print(f"loss {losses[0]:.2f} -> {losses[-1]:.2f}, {adapters.num_trainable():,} of {base.num_parameters():,} trained")

folder = Path(tempfile.mkdtemp())
torch.save(adapters.adapter_state_dict(), folder / "sorsa.pt")
state = torch.load(folder / "sorsa.pt", weights_only=True)
again = copy.deepcopy(base)
apply_adapter(again, SORSAConfig(**state["config"])).load_adapter_state_dict(state)

adapters.merge()
model.save_pretrained(folder)
merged = LlamaForCausalLM.from_pretrained(folder)
difference = max((other(tokens).logits - model(tokens).logits).abs().max().item() for other in (again, merged))
print(f"loaded again, the largest difference of a logit is {difference:.1e}")
