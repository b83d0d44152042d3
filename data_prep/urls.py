"""What a URL of data must not have in it, and what messages must not say of one."""

import re

# `pipeline.data.urls` has the same, because neither package may import the other.
# A user or password before "@". An S3 secret may have "/" in it; a port is none.
CREDENTIALS = re.compile(r"://(?:[^/?#@\s]*|(?!\[)[^/?#@\s]*:(?!\d*/)[^@\s]*)@")
# What follows file:// and local:// is a path, in which "?" is a letter.
QUERY = re.compile(r"((?<!\bfile)(?<!\blocal)://[^\s?'\"]*)\?[^\s'\"]*")
HINT = (
    "which run folders, logs and MLflow would show; leave it out, and give credentials to the "
    "store's driver, such as AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY or "
    "GOOGLE_APPLICATION_CREDENTIALS (docs/data.md, Credentials)"
)


def check_url(location: str) -> None:
    """Raises `ValueError` for a URL with a user, a password, or a query, as signed ones have; paths
    are never wrong here."""
    if (shown := masked(location)) != location:
        what = "a query" if CREDENTIALS.search(location) is None else "a user or password"
        raise ValueError(f"{shown}: got {what} in the URL of data, {HINT}")


def masked(text: str) -> str:
    """A text with "***" for what its URLs have of these."""
    return QUERY.sub(r"\1?***", CREDENTIALS.sub("://***@", text))
