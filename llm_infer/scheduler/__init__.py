"""Continuous batching on the host: requests and sequences, the plan of a step, the scheduler; imports without jax."""

from llm_infer.scheduler.plan import ScheduledRow, StepPlan
from llm_infer.scheduler.request import Request, Sequence, Status, TokenEvent
from llm_infer.scheduler.scheduler import Scheduler

__all__ = ["Request", "ScheduledRow", "Scheduler", "Sequence", "Status", "StepPlan", "TokenEvent"]
