"""What a node tells people: its screen, its events and its status. Read in this order:

events, event_words                            what happened: one JSON object each, and in words
console, repetitions                           the screen; what happens again and again is told once
document, status_view                          the status document; how a person reads it
status_socket, remote_status                   asking for it on this machine, or from elsewhere
"""
