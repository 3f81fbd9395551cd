"""What every command shares: its flags, logs, HTTP endpoint, files of lines. It knows no service."""
