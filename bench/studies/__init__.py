"""The studies, a file each: what it varies, what it measures, and what it draws."""
