"""The GPUs of a node as NVIDIA's driver sees them: which are ill, and whether Ray counts them."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from heliostat.cluster.preflight.finding import Finding, Level

GIB = 2**30
# Bits of nvmlDeviceGetCurrentClocksEventReasons (NVML API reference, nvmlClocksEventReasons) that
# say that a GPU is held back by heat or by its supply; the others are an idle or a busy one's.
HEAT, SUPPLY = "let it cool: check fans and air of this node", "check the power supply of this node"
SLOWED = {
    0x08: ("slowed down by the hardware", f"{HEAT}, then its power supply"),
    0x20: ("slowed down by the driver, too hot", HEAT),
    0x40: ("slowed down by the hardware, too hot", HEAT),
    0x80: ("slowed down, a power brake is pulled", SUPPLY),
}
WARM_CELSIUS = 5
OCCUPIED_BYTES = GIB


@dataclass(frozen=True)
class Gpu:
    """One device; what its driver does not tell is None.

    `memory_errors` were not corrected since the driver was loaded. `remap_pending` wants a reset,
    `remap_failed` a new device. `event_reasons` are the bits of NVML; `slow_celsius` is where it
    slows itself down.
    """

    name: str
    memory_bytes: int
    memory_free_bytes: int
    celsius: int | None = None
    slow_celsius: int | None = None
    memory_errors: int | None = None
    remap_pending: bool = False
    remap_failed: bool = False
    event_reasons: int = 0


@dataclass(frozen=True)
class Gpus:
    """Those of a node; `declared` is what its Ray counts and `in_use` whether Ray lent any.

    A node that `stands_in` for a machine declares GPUs that need not be there.
    """

    devices: tuple[Gpu, ...]
    declared: float
    in_use: bool
    error: str = ""
    stands_in: bool = False


def read_gpus() -> tuple[tuple[Gpu, ...], str]:
    """The devices of this machine, and what the driver answered where it could not be asked.

    Ray brings the Python side of NVML along; no driver at all means no GPUs.
    """
    from ray._private.thirdparty import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        missing = error.value == pynvml.NVML_ERROR_LIBRARY_NOT_FOUND
        return (), "" if missing else str(error)
    try:
        return tuple(_read(pynvml, index) for index in range(pynvml.nvmlDeviceGetCount())), ""
    except pynvml.NVMLError as error:
        return (), str(error)
    finally:
        pynvml.nvmlShutdown()


def judge_gpus(found: Mapping[str, Gpus]) -> list[Finding]:
    findings = []
    for node, gpus in found.items():
        wrong = [*_judge_count(node, gpus)]
        for index, gpu in enumerate(gpus.devices):
            wrong += _judge_device(node, index, gpu, gpus.in_use)
        findings += wrong or [Finding(node, "GPU", "ok", _describe(gpus))]
    return findings


def _read(nvml: Any, index: int) -> Gpu:
    device = nvml.nvmlDeviceGetHandleByIndex(index)

    def ask(question: Callable[[], Any]) -> Any:
        """None from a device that does not support the question."""
        try:
            return question()
        except nvml.NVMLError:
            return None

    memory = nvml.nvmlDeviceGetMemoryInfo(device)
    threshold = nvml.NVML_TEMPERATURE_THRESHOLD_SLOWDOWN
    errors = nvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, nvml.NVML_VOLATILE_ECC
    remapped = ask(lambda: nvml.nvmlDeviceGetRemappedRows(device)) or (0, 0, 0, 0)
    return Gpu(
        str(nvml.nvmlDeviceGetName(device)),
        memory.total,
        memory.free,
        ask(lambda: nvml.nvmlDeviceGetTemperature(device, nvml.NVML_TEMPERATURE_GPU)),
        ask(lambda: nvml.nvmlDeviceGetTemperatureThreshold(device, threshold)),
        ask(lambda: nvml.nvmlDeviceGetTotalEccErrors(device, *errors)),
        bool(remapped[2]),
        bool(remapped[3]),
        ask(lambda: nvml.nvmlDeviceGetCurrentClocksThrottleReasons(device)) or 0,
    )


def _judge_count(node: str, gpus: Gpus) -> Iterator[Finding]:
    if gpus.error:
        advice = "run `nvidia-smi` on this node and load or mend its driver"
        yield Finding(node, "GPU", "failed", f"the driver says: {gpus.error}", advice)
    elif gpus.stands_in:
        return
    elif gpus.declared > len(gpus.devices):
        measured = f"Ray counts {gpus.declared:g}, the driver sees {len(gpus.devices)}"
        advice = "find the GPU that fell off (`nvidia-smi -L`), or start Ray with the right count"
        yield Finding(node, "GPU", "failed", measured, advice)
    elif gpus.declared < len(gpus.devices):
        measured = f"Ray counts {gpus.declared:g}, the driver sees {len(gpus.devices)}"
        advice = "start Ray with all of them, if no one else uses the others"
        yield Finding(node, "GPU", "warning", measured, advice)


def _judge_device(node: str, index: int, gpu: Gpu, in_use: bool) -> Iterator[Finding]:
    def found(level: Level, measured: str, advice: str) -> Finding:
        return Finding(node, f"GPU {index}", level, measured, advice)

    if gpu.remap_failed:
        yield found("failed", "memory rows could not be remapped", "have this GPU replaced")
    elif gpu.remap_pending:
        yield found("failed", "memory rows wait to be remapped", "reset this GPU or the node")
    elif gpu.memory_errors:
        measured = f"{gpu.memory_errors:,} memory errors that ECC could not correct"
        yield found("failed", measured, "reset this GPU, and have it replaced if it comes again")
    for bit, (what, advice) in SLOWED.items():
        if gpu.event_reasons & bit:
            yield found("failed", what, advice)
    if None not in (gpu.celsius, gpu.slow_celsius):
        yield from _judge_heat(found, gpu.celsius or 0, gpu.slow_celsius or 0)
    occupied_bytes = gpu.memory_bytes - gpu.memory_free_bytes
    if occupied_bytes > OCCUPIED_BYTES and not in_use:
        measured = f"{occupied_bytes / GIB:.1f} of {gpu.memory_bytes / GIB:.1f} GiB are taken"
        yield found("warning", measured, "end what uses it beside Ray (`nvidia-smi`)")


def _judge_heat(
    found: Callable[[Level, str, str], Finding], celsius: int, slow_celsius: int
) -> Iterator[Finding]:
    measured = f"{celsius} C, it slows down at {slow_celsius} C"
    if celsius >= slow_celsius:
        yield found("failed", measured, HEAT)
    elif celsius >= slow_celsius - WARM_CELSIUS:
        yield found("warning", measured, HEAT)


def _describe(gpus: Gpus) -> str:
    if not gpus.devices:
        declared = f", {gpus.declared:g} declared for the machine that it stands for"
        return "none" + declared * (gpus.stands_in and gpus.declared > 0)
    names = ", ".join(sorted({gpu.name for gpu in gpus.devices}))
    free_bytes = min(gpu.memory_free_bytes for gpu in gpus.devices)
    return f"{len(gpus.devices)} x {names}, {free_bytes / GIB:.1f} GiB free or more"
