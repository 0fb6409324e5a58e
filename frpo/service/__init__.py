"""The reward service's HTTP side: wire formats and the application. Knows neither Ray nor how scores are
made."""
