"""A process of `examples/distributed.py` that records its steps and fails where it is told to.

python -m tests.faulty_process RECORD FAULT STEP FLAGS...
"""

import json
import os
import signal
import sys
from pathlib import Path

import orbax.checkpoint as ocp
from jax.flatten_util import ravel_pytree

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import distributed

SIGNALS = {"stop": signal.SIGSTOP, "terminate": signal.SIGTERM, "kill": signal.SIGKILL}


def main(record_path, fault, fault_step, *flags):
    record = open(record_path, "a", buffering=1)  # noqa: SIM115  # whole lines, however it ends
    train_step = distributed.train_step
    save, write = ocp.CheckpointManager.save, ocp.StandardCheckpointHandler.async_save

    def fail():
        record.write(json.dumps(fault) + "\n")
        if fault == "raise":
            raise RuntimeError("injected")
        os.kill(os.getpid(), SIGNALS.get(fault, signal.SIGKILL))

    def recorded_step(state, images, labels):
        step = int(state.step) + 1
        if step == int(fault_step) and fault in (*SIGNALS, "raise"):
            fail()
        state, loss = train_step(state, images, labels)
        values = ravel_pytree((loss, state.batch_stats))[0]
        record.write(json.dumps([step, values.tolist()]) + "\n")
        return state, loss

    def finished_save(manager, *args, **kwargs):
        save(manager, *args, **kwargs)
        manager.wait_until_finished()  # so that it is known what a later fault leaves

    async def faulty_write(handler, directory, args):
        if int(args.item.step) == int(fault_step) and fault == "kill during save":
            fail()
        return await write(handler, directory, args=args)

    distributed.train_step = recorded_step
    ocp.CheckpointManager.save = finished_save
    ocp.StandardCheckpointHandler.async_save = faulty_write
    distributed.main(flags)


if __name__ == "__main__":
    main(*sys.argv[1:])
