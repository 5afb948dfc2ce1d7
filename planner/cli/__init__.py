"""The command line: `plan init | profile | simulate | run | report`. One module per command."""
