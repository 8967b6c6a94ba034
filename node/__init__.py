"""The real world around a `Peer`: libp2p, the disk, worker threads, the trainer process and the command line.

cli, flags, cluster                        commands
process, start, run, founded_content, ends one node from start to exit
driver, failpoints                         a peer's effects, performed; where a test holds it between them
network                                    links to other nodes, and bytes over them
storage                                    the log, the content and small files on the disk
training                                   the trainer process, the only one that imports torch, and all else with tensors
reporting                                  screen, events, status
"""
