"""Log lines about a job carry its id as a field of Serve's JSON, beside the replica and the request id.

The field is `reconstruction_id`: `job_id` is Ray's name for something of its own, and Serve takes it out of every line.
"""

import logging

Log = logging.LoggerAdapter[logging.Logger]


def log_of(job_id: str) -> Log:
    return logging.LoggerAdapter(logging.getLogger("ray.serve"), {"reconstruction_id": job_id})
