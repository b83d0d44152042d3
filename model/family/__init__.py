"""The rest of the DETR family, a method a file: its choice of parts and what is truly its own.

What lives here: subclasses of `SetDetector` with their query formulations, attentions, heads and
published names. It may import what `model` may; no method imports another one, but for the parts
that several share, which have files of their own.
"""
