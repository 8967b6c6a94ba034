"""What lies on this machine's disk. Read in this order:

whole_file, directory   files that appear whole or not at all; one process in a directory
identity_key            the node's Ed25519 key
objects, store          content-addressed bytes; the log, and all of a node's store
log_replay, verify      a log read by somebody who believes nothing of it; `p2pcoord verify`
model_checksum, export  a model file that says what it holds; `p2pcoord export`
"""
