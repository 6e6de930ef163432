"""What must not hurt: inputs that were made to break a server, or that a careless client sends. Made in code.

`pictures` are encoded files, `uris` and `urls` name pictures, `requests` puts all of them and wrong bodies into HTTP
requests with the answer that each must get.
"""
