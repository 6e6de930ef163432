"""What a run writes and others read: its folder, status and control files, step log, rollout log, events."""
