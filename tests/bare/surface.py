"""`torch.bare`: what torch and its users ask of a device's module."""

import contextlib
from collections.abc import Callable, Iterable
from typing import Any

import torch


def module(default: torch.Generator) -> Any:
    """The namespace of a device with one index, one stream and one default generator."""

    class bare:
        default_generators = (default,)
        amp_dtypes = (torch.bfloat16, torch.float16)
        host_memory = True

        class device(contextlib.nullcontext[None]):
            """There is one bare device, so none has to be chosen."""

        @staticmethod
        def is_available() -> bool:
            return True

        @staticmethod
        def is_initialized() -> bool:
            return True

        @staticmethod
        def device_count() -> int:
            return 1

        @staticmethod
        def current_device() -> int:
            return 0

        @staticmethod
        def set_device(device: Any) -> None:
            index = torch.device("bare", device).index if isinstance(device, int) else torch.device(device).index
            if index:
                raise RuntimeError(f"there is one bare device, got index {index}")

        @staticmethod
        def synchronize(device: Any = None) -> None:
            """Nothing runs behind a caller's back."""

        @staticmethod
        def empty_cache() -> None:
            """Freed memory is the host's at once."""

        @staticmethod
        def get_rng_state(device: Any = "bare") -> torch.Tensor:
            """Sixteen bytes: the seed and the offset in its stream."""
            return default.get_state()

        @staticmethod
        def set_rng_state(state: torch.Tensor, device: Any = "bare") -> None:
            default.set_state(state)

        @staticmethod
        def get_rng_state_all() -> list[torch.Tensor]:
            return [default.get_state()]

        @staticmethod
        def set_rng_state_all(states: Iterable[torch.Tensor]) -> None:
            (state,) = states
            default.set_state(state)

        @staticmethod
        def manual_seed(seed: int) -> None:
            default.manual_seed(seed)

        manual_seed_all = manual_seed

        @staticmethod
        def initial_seed() -> int:
            return default.initial_seed()

        @staticmethod
        def _is_in_bad_fork() -> bool:
            return False

        @staticmethod
        def _lazy_call(call: Callable[[], Any], **_: Any) -> None:
            call()

        @staticmethod
        def get_amp_supported_dtype() -> list[torch.dtype]:
            return list(bare.amp_dtypes)

    return bare
