"""Faults of worker processes. They import this module, so it imports little."""

from __future__ import annotations

import os
import signal

from longalign.data.chat_template import Segment
from longalign.data.messages import Messages
from longalign.data.shards import Task
from longalign.data.template import Template


class Deadly:
    """Stands in for shards.Writer on a machine without memory."""

    def __init__(self, *_: object):
        pass

    def __call__(self, task: Task) -> int:
        if any(b"trap" in record.value for record in task.records()):
            os.kill(os.getpid(), signal.SIGKILL)
        return len(task.records())


class Trapped(Template):
    """A template with a defect."""

    def segments(self, messages: Messages) -> list[list[Segment]]:
        if messages[0]["content"] == "trap":
            raise ZeroDivisionError
        return super().segments(messages)
