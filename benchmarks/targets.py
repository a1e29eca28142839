"""GPUs to compile for: their limits and rates as data, and what a program's use of them implies."""

from __future__ import annotations

from dataclasses import dataclass

from triton.backends.compiler import GPUTarget

from wemoe_fast.kernels.tuning import Device


@dataclass(frozen=True)
class Target:
    """A GPU to compile for. Limits are those of one multiprocessor (compute unit), rates those of all of them.

    Registers are 32 bits wide and counted over all threads; ``reserved`` is what every program takes of the shared
    memory beside its own. Rates are in 1e12 a second: FLOPs of matrix instructions by dtype, FLOPs of ordinary
    instructions in float32, bytes out of L2.
    """

    gpu: GPUTarget
    device: Device
    shared_memory: int
    reserved: int
    registers: int
    warps: int
    programs: int
    matrix: str
    rates: dict[str, float]
    flops: float
    l2: float
    source: str

    @property
    def nvidia(self) -> bool:
        return bool(self.gpu.backend == "cuda")


CUDA_GUIDE = "CUDA Programming Guide, table of compute capabilities"
TARGETS = {
    "sm_80": Target(
        GPUTarget("cuda", 80, 32), Device("sm_80", 163 << 10, "ampere"),
        shared_memory=164 << 10, reserved=1 << 10, registers=64 << 10, warps=64, programs=32, matrix="HMMA",
        rates={"float16": 312, "bfloat16": 312, "tf32": 156, "float32": 19.5}, flops=19.5, l2=7.2,
        source=f"{CUDA_GUIDE}; A100 SXM data sheet; L2: A100 white paper, 5120 B a clock at 1.41 GHz",
    ),
    "sm_90": Target(
        GPUTarget("cuda", 90, 32), Device("sm_90", 227 << 10, "hopper"),
        shared_memory=228 << 10, reserved=1 << 10, registers=64 << 10, warps=64, programs=32, matrix="HGMMA",
        rates={"float16": 989, "bfloat16": 989, "tf32": 495, "float32": 67}, flops=67, l2=5.5,
        source=f"{CUDA_GUIDE}; H100 SXM data sheet, dense; L2: assumed, about what micro-benchmarks reach",
    ),
    "sm_100": Target(
        GPUTarget("cuda", 100, 32), Device("sm_100", 227 << 10, "hopper"),
        shared_memory=228 << 10, reserved=1 << 10, registers=64 << 10, warps=64, programs=32, matrix="UTCHMMA",
        rates={"float16": 2250, "bfloat16": 2250, "tf32": 1125, "float32": 75}, flops=75, l2=7,
        source=f"{CUDA_GUIDE}; HGX B200 data sheet, dense; L2: assumed, as much a multiprocessor as on H100",
    ),
    "gfx942": Target(
        GPUTarget("hip", "gfx942", 64), Device("gfx942", 64 << 10, "cdna"),
        shared_memory=64 << 10, reserved=0, registers=128 << 10, warps=32, programs=32, matrix="v_mfma",
        rates={"float16": 1307, "bfloat16": 1307, "tf32": 654, "float32": 163}, flops=163, l2=34,
        source="CDNA 3 white paper and MI300X data sheet, dense; L2: assumed, 2 KiB a clock and die, 8 dies, 2.1 GHz",
    ),
}  # fmt: skip


def resident_programs(registers: int, shared: int, warps: int, target: Target) -> int:
    """How many programs run on a multiprocessor at once."""
    per_program = -(-max(1, registers) // 8) * 8 * target.gpu.warp_size * warps
    return min(
        target.programs,
        target.warps // warps,
        target.registers // per_program,
        target.shared_memory // (shared + target.reserved) if shared + target.reserved else target.programs,
    )


@dataclass(frozen=True)
class Work:
    """Of one program in one step of its loop: FLOPs of matrix products and of merging, bytes read out of L2."""

    products: float
    merging: float
    bytes: float

    def seconds(self, target: Target, dtype: str) -> dict[str, float]:
        """What each would take by itself with the whole GPU, times 1e12; an estimate."""
        times = {"matrix": self.products / target.rates[dtype], "merge": self.merging / target.flops}
        if dtype == "float32" and target.nvidia:  # the same units
            times = {"fp32": sum(times.values())}
        return {**times, "L2": self.bytes / target.l2}
