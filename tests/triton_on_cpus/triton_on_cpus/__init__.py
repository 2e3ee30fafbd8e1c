"""vLLM's V2 model runner on CPUs, for tests: Triton's interpreter runs its kernels.

vLLM has a V2 runner for CPUs, which wants a Triton with a back end for them; there is none on any package
index. A process that has this directory's parent in `PYTHONPATH` finds one by its entry point. Nothing is
ever compiled by it: with `TRITON_INTERPRET=1` every kernel is interpreted.
"""

from __future__ import annotations

import numpy as np


def register() -> None:
    """Mend the interpreter, and let vLLM schedule asynchronously on CPUs. vLLM calls it in each process."""
    _keep_the_type_of_scalars()
    _keep_asynchronous_scheduling()


def _keep_the_type_of_scalars() -> None:
    """Triton 3.9's interpreter makes integers of a comparison of scalars, which then is no mask."""
    from triton.runtime import interpreter

    def create_splat(self, ret_ty, arg):
        scalar = np.ravel(arg.data)[0]
        return interpreter.TensorHandle(np.full(ret_ty.shape, scalar), arg.dtype.scalar)

    interpreter.InterpreterBuilder.create_splat = create_splat


def _keep_asynchronous_scheduling() -> None:
    """On CPUs vLLM switches it off whatever it was told."""
    from vllm.platforms.cpu import CpuPlatform

    resolve = CpuPlatform.check_and_update_config.__func__
    if resolve.__module__ == __name__:
        return  # this process has it already

    def check_and_update_config(cls, vllm_config):
        scheduler = vllm_config.scheduler_config
        told = scheduler.async_scheduling
        resolve(cls, vllm_config)
        scheduler.async_scheduling = told

    CpuPlatform.check_and_update_config = classmethod(check_and_update_config)
