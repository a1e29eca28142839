"""What is in a WEMoE model: layers, parameters, memory, routers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import Tensor, nn

from .upscale import merge_info, wemoe_layers


def inspect(model: nn.Module) -> str:
    """A readable summary of a model with WEMoE layers."""
    layers = wemoe_layers(model)
    info = merge_info(model)
    rows = [["layer", "in -> hidden -> out", "activation", "stack", "router", "normalisation", "router params"]]
    for name, layer in layers.items():
        router = layer.router
        stacked = [p for n, p in layer.named_parameters() if not n.startswith("router.")]
        sizes = (layer.up.stack.shape[2], layer.up.stack.shape[1], layer.down.stack.shape[1])
        norm = router.normalization
        rows.append(
            [
                name or "(the model)",
                " -> ".join(map(str, sizes)) + (" gated" if layer.gate is not None else ""),
                layer.activation,
                readable_size(_bytes(stacked)),
                f"depth {router.depth}" + (", batch" if router.batch_reduce else ", per sample"),
                norm.kind + (f", top {norm.top_k}" if norm.top_k else ""),
                f"{sum(p.numel() for p in router.parameters()):,}",
            ]
        )
    parameters = list(model.parameters())
    inside = {id(p) for layer in layers.values() for p in layer.parameters()}
    outside = [p for p in parameters if id(p) not in inside]
    trainable = [p for p in parameters if p.requires_grad]
    dtypes = sorted({str(p.dtype).removeprefix("torch.") for p in parameters})
    lines = [
        f"{type(model).__name__} with {len(layers)} WEMoE layers, "
        f"{len(info.experts)} experts: {', '.join(info.experts)}",
        "",
        *aligned(rows),
        "",
        f"parameters   {_count(parameters)} in all, {_count(outside)} outside of the WEMoE layers, "
        f"{_count(trainable)} trainable",
        f"memory       {readable_size(_bytes(parameters))} ({', '.join(dtypes)})",
    ]
    lines += [f"{key:<12} {value}" for key, value in info.settings.items()]
    return "\n".join(lines)


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table, one a row, cells of a column equally wide."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def _count(parameters: Sequence[Tensor]) -> str:
    return f"{sum(p.numel() for p in parameters):,}"


def readable_size(count: int) -> str:
    """Bytes for people: 1.5 MiB."""
    size = float(count)
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.1f} {unit}" if unit != "B" else f"{count} B"
        size /= 1024
    return f"{size:.2f} GiB"
