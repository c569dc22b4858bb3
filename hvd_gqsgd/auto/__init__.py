"""``bits="auto"``: measures the exchange of each step, and chooses the setting of the next one."""
