"""What people read of a job: the status and the page of captioned pictures."""
