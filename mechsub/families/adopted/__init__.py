"""Models that somebody else trained: their folders take the places of reference, teachers, students and controls."""
