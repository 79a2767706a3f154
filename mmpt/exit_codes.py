"""What the exit status of train.py tells whoever started it. The launcher acts on these numbers.

FINISHED      the run is complete, or stopped where `run.stop_at_step` asked it to
FAILED        one line of error says why; trying again may help
WRONG_USE     the command line or configuration is wrong; trying again cannot help
REQUEUE       told to stop, by a signal or the clock: progress is saved, the same command continues
HUNG          nothing moved for too long; every rank's stacks are in the run directory; the same command continues
UNFIT_NODE    a node failed the checks before the start; its name and the reason are on the console and in events.jsonl
NOT_FINITE    the loss is not finite any more, or spikes came back after the last rollback that was allowed; trying
              again cannot help
"""

FINISHED = 0
FAILED = 1
WRONG_USE = 2
REQUEUE = 75
HUNG = 76
UNFIT_NODE = 77
NOT_FINITE = 78
