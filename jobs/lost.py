"""What Ray says of processes that are gone, and of those killed for memory, as one line.

Light: the job's entry point and the commands that follow a job import it.
"""

import re

LOW_ON_MEMORY = "running low on memory"  # so Ray's memory monitor says whom it killed, and why
NODE = re.compile(r"Memory on the node \(IP: ([^,]+),.*?\) was (.+?) used / (.+?) limit")
# What Ray writes to the log of a job whose leading process, the supervisor, is gone.
SUPERVISOR = re.compile(r"(?:Unexpected error occurred|Job supervisor actor died): ")
LESS_MEMORY = (
    "lower --engine.micro-batch (to 1) or --engine.loader-workers, take smaller "
    "--augment.short-sides or a smaller recipe (each with another --output), put fewer workers on "
    "a node (--workers, --cpus-per-worker), or close other programs there"
)


class WorkersLost(Exception):
    """Training ended because its processes were lost too often. The message says all."""


def killed_for_memory(error: BaseException) -> bool:
    """Whether Ray's memory monitor killed the process."""
    return LOW_ON_MEMORY in str(error) or NODE.search(str(error)) is not None


def node_memory(text: str) -> str:
    """Which node ran low on memory, and its use, in Ray's words."""
    found = NODE.search(text)
    if not found:
        return "its node ran low on memory"
    node, used, limit = found.groups()
    return f"node {node} ran low on memory ({used} used of {limit})"


def in_a_line(error: BaseException) -> str:
    """What happened. Of a process that is gone Ray tells in many lines, the reason in one of them:
    "The actor died because its node has died.", "Memory on the node (IP: 10.0.0.1, ID: 3d40) was
    22GB used / 23GB limit (0.95)"."""
    if killed_for_memory(error):
        return f"a worker was killed: {node_memory(str(error))}"
    text = str(error).removeprefix("A worker health check failed.\n")
    because = re.search(r"The actor[^.\n]* because[^.\n]*", text)
    if because:
        return because.group().replace("The actor", "a worker", 1)
    return (text.strip().splitlines() or [type(error).__name__])[0]


def of_supervisor(line: str) -> str:
    """The line for a job whose supervisor is gone, made of Ray's own; empty for any other line."""
    if not SUPERVISOR.match(line):
        return ""
    if LOW_ON_MEMORY not in line:
        return f"the job's supervisor is gone ({SUPERVISOR.sub('', line, count=1).strip()})"
    return (
        f"the job's own process was killed: {node_memory(line)}; {LESS_MEMORY}; the same command "
        f"goes on from the last checkpoint"
    )
