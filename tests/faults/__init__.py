"""The fault suite: servers and processes die, hang, lose replies, fill up; no balance may suffer.

`make test` runs it in its short form, `make torture` in the long one.
"""
