"""What a turn is: no threads, clock, sockets, Flask, SQL or Agentao in here."""
