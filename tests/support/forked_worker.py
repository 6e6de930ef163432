"""What raylet starts in place of `setup_worker.py`: asks the server of forks for a worker, and ends with it."""

import json
import os
import socket
import sys

context, arguments = {}, []
for argument in sys.argv[1:]:
    name, _, value = argument.partition("=")
    if name == "--serialized-runtime-env-context":
        context = json.loads(value)
    elif name != "--language":
        arguments.append(argument)

environment = {**os.environ, **(context.get("env_vars") or {})}
request = json.dumps(["tests.support.forks:worker", arguments, environment, os.getcwd()]).encode()
with socket.socket(socket.AF_UNIX) as server:
    server.connect(os.environ["MMRL_TEST_FORKS"])
    socket.send_fds(server, [len(request).to_bytes(4, "big")], (1, 2))
    server.sendall(request)
    while server.recv(100):
        pass
