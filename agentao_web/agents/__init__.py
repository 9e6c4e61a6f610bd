"""The only package that imports agentao: how agents are built, heard, stopped and confined."""
