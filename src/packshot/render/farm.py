from __future__ import annotations
import hashlib, json
VERSION = 2
def job_name(job, size, samples):
    text = json.dumps([VERSION, job, size, samples], sort_keys=True)
    return f"{job['seed']}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"
