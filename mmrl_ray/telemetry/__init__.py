"""What a run tells those who watch it: metrics for Prometheus, and log lines. Only `ray_meter` needs Ray."""
