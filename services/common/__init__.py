"""What every command shares: flags, logs, the HTTP endpoint, files of lines, ways in. It knows no service."""
