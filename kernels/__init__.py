"""Triton kernels, one file per op; installed as ``fastdiff.kernels``.

A distribution called ``kernels`` belongs to somebody else (diffusers imports it when present), so
this folder must never answer to that name, which it would when Python runs in the repository root.
"""

if __name__ != "fastdiff.kernels":
    raise ImportError(
        f"this package must be imported as fastdiff.kernels, got {__name__!r}: the repository "
        "root is on sys.path; set PYTHONSAFEPATH=1 or run from another directory"
    )
