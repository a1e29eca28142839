"""FastWEMoEMLP: the module that takes the place of an MLP in a merged model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from . import ops
from .activations import lookup
from .errors import InputError
from .linears import weight_of
from .masks import TokenMasks
from .prompts import PromptWeights, check_routing
from .router import Router
from .sequences import SequenceMLP
from .structure import MLPParts, parse_mlp
from .task_vectors import MergedLinear, expert_problems


class FastWEMoEMLP(nn.Module):
    """An MLP whose weights are merged for every sample by a router (WEMoE, arXiv 2402.00433, section 3.2).

        w_b = router(h_b)          W_b = W_0 + sum_t w_bt tau_t          y_b = MLP(h_b; W_b)

    Build it with :meth:`from_mlps` or :meth:`from_wemoe`. Base weights and task vectors are frozen;
    ``router`` holds the only trainable parameters. Dropout inside the original MLP is not kept: merged models
    are run, and their routers adapted, in evaluation mode.

    Attributes:
        router: ``Router``.
        up, down, gate: ``MergedLinear``; ``gate`` is None in a plain MLP.
        activation: name of the activation, see ``wemoe_fast.activations``.
        batch_first: hidden states are [B, N, d]; if False [N, B, d].
        batch_reduce: one routing weight for the whole batch, the mean over its samples.
        batch_invariant: run every sample by itself on its own unpadded tokens, so that its output is the same
            bit for bit whatever else is in the batch, wherever it stands and however it is padded. Costs what
            a batch of one costs, per sample: see benchmarks/NOTES.md. Not with ``batch_reduce``.
        decode_routing: "prompt" or "step": whether a prompt fixes the routing weights of the text generated from it,
            or every forward routes on the tokens it is given; see ``wemoe_fast.generation``.
        strategy: see ``wemoe_fast.ops.merged_linear``.
        prompt: the routing weights of the generation under way, None outside of one.
        token_masks: where the masks of the model around it arrive, see ``wemoe_fast.masks``.
    """

    def __init__(
        self,
        *,
        router: Router,
        up: MergedLinear,
        down: MergedLinear,
        gate: MergedLinear | None = None,
        activation: str = "gelu",
        batch_first: bool = True,
        batch_invariant: bool = False,
        decode_routing: str = "prompt",
        strategy: str = "auto",
    ) -> None:
        super().__init__()
        lookup(activation)
        self.router, self.up, self.down, self.gate = router, up, down, gate
        self.activation, self.strategy = activation, strategy
        self.batch_first, self.batch_invariant = batch_first, batch_invariant
        self.decode_routing = decode_routing
        self.prompt: PromptWeights | None = None
        self.token_masks: TokenMasks | None = None

    @classmethod
    def from_mlps(
        cls,
        base: nn.Module,
        experts: Sequence[nn.Module] | Mapping[str, nn.Module],
        *,
        router_depth: int = 2,
        init_lambda: float = 0.3,
        normalization: str = "identity",
        temperature: float = 1.0,
        top_k: int | None = None,
        batch_first: bool = True,
        batch_reduce: bool = False,
        batch_invariant: bool = False,
    ) -> FastWEMoEMLP:
        """Merge an MLP and its fine-tuned versions.

        Args:
            base: the pretrained MLP: two linears and an activation, or gated (gate, up, down); biases or none;
                any floating dtype. Recognised by structure and verified by running it once.
            experts: T modules fine-tuned from ``base``, in any floating dtype; nothing given is changed or referenced.
            router_depth, init_lambda, normalization, temperature, top_k, batch_reduce: see ``Router``.
            batch_first, batch_invariant: see the class.

        Raises:
            InputError: no expert, a module that is no MLP, experts that differ from the base in structure,
                shape or device, weights that are not finite: everything found, at once.
        """
        named = experts if isinstance(experts, Mapping) else {str(t): e for t, e in enumerate(experts)}
        parts: dict[str, MLPParts] = {}
        problems = []
        for name, module in {"base": base, **{f"expert {name!r}": e for name, e in named.items()}}.items():
            try:
                parts[name] = parse_mlp(module)
            except InputError as error:
                problems.append(f"{name}: {error}")
        taken = {name: parts[f"expert {name!r}"] for name in named if f"expert {name!r}" in parts}
        if problems:
            raise InputError.of("from_mlps", problems + (_mismatches(parts["base"], taken) if "base" in parts else []))
        return cls.from_parts(
            parts["base"],
            taken,
            router_depth=router_depth,
            init_lambda=init_lambda,
            normalization=normalization,
            temperature=temperature,
            top_k=top_k,
            batch_first=batch_first,
            batch_reduce=batch_reduce,
            batch_invariant=batch_invariant,
        )

    @classmethod
    def from_parts(
        cls,
        base: MLPParts,
        experts: Mapping[str, MLPParts],
        *,
        router_depth: int = 2,
        init_lambda: float = 0.3,
        normalization: str = "identity",
        temperature: float = 1.0,
        top_k: int | None = None,
        batch_first: bool = True,
        batch_reduce: bool = False,
        batch_invariant: bool = False,
        decode_routing: str = "prompt",
        subject: str = "from_mlps",
    ) -> FastWEMoEMLP:
        """:meth:`from_mlps` for MLPs taken apart already; ``subject`` names the place in error messages."""
        problems = _mismatches(base, experts) if experts else ["expected at least one expert, found none"]
        if problems:
            raise InputError.of(subject, problems)
        merged = {
            role: MergedLinear.from_linears(linear, [e.linears()[role] for e in experts.values()])
            for role, linear in base.linears().items()
        }
        weight = weight_of(base.up)
        router = Router(
            base.in_features,
            len(experts),
            depth=router_depth,
            init_lambda=init_lambda,
            normalization=normalization,
            temperature=temperature,
            top_k=top_k,
            batch_reduce=batch_reduce,
            device=weight.device,
            dtype=weight.dtype,
        )
        return cls(
            router=router,
            up=merged["up"],
            down=merged["down"],
            gate=merged.get("gate"),
            activation=base.activation,
            batch_first=batch_first,
            batch_invariant=batch_invariant,
            decode_routing=decode_routing,
        )

    @classmethod
    def from_wemoe(cls, module: nn.Module) -> FastWEMoEMLP:
        """The same function as an existing WEMoE module, sharing its router's parameters.

        Takes FusionBench's ``WeightEnsemblingMoE`` and ``SparseWeightEnsemblingMoE`` (with a shared gate and
        positional encoding too) and the authors' ``DictMoE``, recognised by structure; see ``interop``.
        """
        from .interop import from_wemoe

        return from_wemoe(module)

    @property
    def num_experts(self) -> int:
        """T."""
        return self.router.num_experts

    @property
    def batch_reduce(self) -> bool:
        return self.router.batch_reduce

    @batch_reduce.setter
    def batch_reduce(self, value: bool) -> None:
        self._choose(self.batch_invariant, value)
        self.router.batch_reduce = value

    @property
    def batch_invariant(self) -> bool:
        return self._batch_invariant

    @batch_invariant.setter
    def batch_invariant(self, value: bool) -> None:
        self._choose(value, self.batch_reduce)
        self._batch_invariant = value

    @property
    def decode_routing(self) -> str:
        return self._decode_routing

    @decode_routing.setter
    def decode_routing(self, value: str) -> None:
        self._decode_routing = check_routing(value)

    @staticmethod
    def _choose(batch_invariant: bool, batch_reduce: bool) -> None:
        if batch_invariant and batch_reduce:
            raise InputError(
                "batch_invariant: with batch_reduce every output depends on the whole batch by definition; "
                "choose one of the two"
            )

    def forward(self, hidden_states: Tensor, token_mask: Tensor | None = None) -> Tensor:
        """MLP of every sample with its own merged weights.

        Args:
            hidden_states: [B, N, d] ([N, B, d] unless ``batch_first``); B may be 0.
            token_mask: [B, N], true or nonzero at the tokens that count for the routing; the others are
                transformed with the sample's weights too. Default: the mask the surrounding model was given.

        Returns:
            the shape of ``hidden_states``, with the last size of ``down``.

        Raises:
            InputError: shapes that do not fit.
        """
        x = self._samples_first(hidden_states)
        mask = self._token_mask(x, token_mask)
        if self.prompt is None:
            weights, merged = self._route(x, mask), None
        else:
            weights = self.prompt.of(x, mask, self._route)
            merged = self._merged_once(x, weights, self.prompt)
        if merged is not None:
            y = merged(x)
        elif self.batch_invariant and x.shape[0] > 0:
            rows = weights.expand(x.shape[0], -1).split(1)
            y = torch.stack([self._alone(x[b], None if mask is None else mask[b], rows[b]) for b in range(x.shape[0])])
        else:
            y = self._transform(x, weights)
        return y if self.batch_first else y.transpose(0, 1)

    def routing_weights(self, hidden_states: Tensor, token_mask: Tensor | None = None) -> Tensor:
        """The routing weights [B, T] that :meth:`forward` would use outside of a generation."""
        x = self._samples_first(hidden_states)
        return self.router(x, self._token_mask(x, token_mask)).expand(x.shape[0], -1)

    def _merged_once(self, x: Tensor, weights: Tensor, prompt: PromptWeights) -> SequenceMLP | None:
        """The MLPs of a generation's sequences, kept with its weights, where that is faster and fits."""
        asked = self.batch_invariant or self.strategy != "auto" or torch.is_autocast_enabled(x.device.type)
        if asked or torch.is_grad_enabled():
            return None
        if prompt.budget is not None and not torch.compiler.is_compiling():
            roles = {"up": self.up, "down": self.down} | ({} if self.gate is None else {"gate": self.gate})
            prompt.mlp = SequenceMLP.build(roles, self.activation, weights, x, prompt.budget)
            prompt.budget = None
        return prompt.mlp

    def _transform(self, x: Tensor, weights: Tensor) -> Tensor:
        nonzero = None if self.batch_reduce else self.router.normalization.top_k
        if not any(_has_hooks(part) for part in (self.up, self.down, self.gate) if part is not None):
            up, down = self.up.tensors, self.down.tensors
            gate = None if self.gate is None else self.gate.tensors
            return ops.merged_mlp(x, up, down, weights, gate, self.activation, self.strategy, nonzero=nonzero)
        hidden = self.up(x, weights, self.activation if self.gate is None else None, self.strategy, nonzero)
        if self.gate is not None:
            hidden = hidden * self.gate(x, weights, self.activation, self.strategy, nonzero)
        return self.down(hidden, weights, None, self.strategy, nonzero)

    def _route(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """Routing weights [B, T] or [1, T] of these tokens."""
        if not self.batch_invariant or x.shape[0] == 0:
            return self.router(x, mask)
        samples = [x[b] if mask is None else x[b][mask[b].bool()] for b in range(x.shape[0])]
        return torch.cat([self.router(_by_itself(sample), None) for sample in samples])

    def _alone(self, tokens: Tensor, mask: Tensor | None, weights: Tensor) -> Tensor:
        """One sample [N, d], its real tokens in memory of their own, then the masked ones."""
        if mask is None:
            return self._transform(_by_itself(tokens), weights)[0]
        mask = mask.bool()
        real, padding = tokens[mask].unsqueeze(0), tokens[~mask].unsqueeze(0)
        transformed = self._transform(real, weights)[0]
        y = transformed.new_empty(tokens.shape[0], transformed.shape[1])
        return y.index_put((mask,), transformed).index_put((~mask,), self._transform(padding, weights)[0])

    def _samples_first(self, hidden_states: Tensor) -> Tensor:
        d = self.up.stack.shape[2]
        if hidden_states.dim() != 3 or hidden_states.shape[2] != d:
            layout = "[B, N, d]" if self.batch_first else "[N, B, d]"
            raise InputError(
                f"FastWEMoEMLP: expected hidden states {layout} with d = {d}, found {tuple(hidden_states.shape)}"
            )
        return hidden_states if self.batch_first else hidden_states.transpose(0, 1)

    def _token_mask(self, x: Tensor, token_mask: Tensor | None) -> Tensor | None:
        if token_mask is None:
            return None if self.token_masks is None else self.token_masks.for_tokens(x)
        return token_mask

    def extra_repr(self) -> str:
        in_features, hidden, out_features = (
            self.up.stack.shape[2],
            self.up.stack.shape[1],
            self.down.stack.shape[1],
        )
        parts = [f"{in_features} -> {hidden} -> {out_features}", f"experts={self.num_experts}"]
        parts += [f"activation={self.activation!r}", f"gated={self.gate is not None}"]
        parts += [f"{flag}=True" for flag in ("batch_reduce", "batch_invariant") if getattr(self, flag)]
        if not self.batch_first:
            parts.append("batch_first=False")
        if self.decode_routing != "prompt":
            parts.append(f"decode_routing={self.decode_routing!r}")
        if self.strategy != "auto":
            parts.append(f"strategy={self.strategy!r}")
        return ", ".join(parts)


def _has_hooks(module: nn.Module) -> bool:
    """Whether somebody waits for this module to be called, or has replaced what calling it does."""
    return bool(module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__)


def _by_itself(tokens: Tensor) -> Tensor:
    """One sample [N, d] as a batch of one, in memory of its own."""
    return tokens.unsqueeze(0).clone(memory_format=torch.contiguous_format)


def _mismatches(base: MLPParts, experts: Mapping[str, MLPParts]) -> list[str]:
    """Everything in which experts differ from the base and must not."""
    activations = [
        f"expert {name!r}: expected activation {base.activation!r} as in the base, found {e.activation!r}"
        for name, e in experts.items()
        if e.activation != base.activation
    ]
    return expert_problems(_tensors(base), {name: _tensors(e) for name, e in experts.items()}) + activations


def _tensors(parts: MLPParts) -> dict[str, Tensor]:
    return {
        f"{role}.{name}": tensor
        for role, linear in parts.linears().items()
        for name, tensor in linear.named_parameters()
    }
