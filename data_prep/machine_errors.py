"""What the operating system raises, as one line with a remedy."""

import errno

# `pipeline.machine_errors` has the same, because neither package may import the other.
REMEDIES = {
    errno.ENOENT: "check the path",
    errno.EACCES: "change its permissions, or choose another place",
    errno.EPERM: "change its permissions, or choose another place",
    errno.EROFS: "choose a place that can be written",
    errno.ENOSPC: "free some, or choose a place on another disk",
    errno.EDQUOT: "free some, or choose a place on another disk",
    errno.EFBIG: "raise the limit on the size of files (ulimit -f)",
    errno.ENOTDIR: "a part of the path is a file; choose another place",
    errno.EISDIR: "give a file, not a folder",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.EMFILE: "raise the limit on open files (ulimit -n 65536)",
    errno.ENOMEM: "close other programs, or take fewer workers",
    errno.EADDRINUSE: "end what listens there, or choose another port",
    errno.EIO: "the disk or its connection fails; copy the file from elsewhere",
    errno.ESTALE: "the network file system was mounted anew; run the command again",
}


def in_a_line(error: OSError) -> str:
    """What was touched, what the system said, and what helps; of an error that some code of Python
    raised with words of its own, those."""
    if error.errno is None or error.strerror is None:
        return " ".join(str(error).split()) or type(error).__name__
    names = [str(name) for name in (error.filename, error.filename2) if name is not None]
    where = f"{' -> '.join(names)}: " if names else ""
    remedy = REMEDIES.get(error.errno)
    return f"{where}{error.strerror}" + (f"; {remedy}" if remedy else "")
