"""Quantise a layer for the least worst error.

A linear layer's weights are rounded to three bits. Rounding each to the nearest level leaves some outputs far off;
`quantize_layer` chooses the levels so that the largest error on calibration inputs is as small as it can find.
"""

import torch

import trimtab
from trimtab.solvers import quantization_grid, quantize_layer

data = trimtab.data.load("digits")
torch.manual_seed(0)
model = torch.nn.Linear(64, 10)
optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
x = data.x_train.flatten(1)
for _ in range(100):
    optimizer.zero_grad()
    torch.nn.functional.cross_entropy(model(x), data.y_train).backward()
    optimizer.step()

weight, inputs = model.weight.detach(), x[:256]
scale, zero = quantization_grid(weight, bits=3)
nearest = ((weight / scale[:, None]).round() + zero[:, None]).clamp(0, 7)
rounded = scale[:, None] * (nearest - zero[:, None])
found = quantize_layer(weight, inputs, bits=3)
test = data.x_test.flatten(1)
worst, accuracy = {}, {}
for name, candidate in (("exact", weight), ("nearest level", rounded), ("min-max violation", found.weight)):
    worst[name] = (inputs @ (candidate - weight).T).abs().max().item()
    accuracy[name] = ((test @ candidate.T + model.bias).argmax(1) == data.y_test).float().mean().item()
    print(f"{name}: largest error {worst[name]:.3f}, {accuracy[name]:.1%} of the test digits are right")
