"""Ray Serve hosts the policy and the reward; one HTTP gateway in front of both.

    client ──HTTP──▶ gateway (keys, limits, OpenAI's types) ──handle──▶ policy replica (continuous batching)
                                                            └──handle──▶ reward replica

Only these import Ray: `deployments.py` (the shells), `services.py` (their callers), `job_service.py` and `launch.py`.
All else is plain Python, tested without it.
"""
