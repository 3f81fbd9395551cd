"""What every command shares: its flags, its logs, its HTTP endpoint. It knows no service."""
