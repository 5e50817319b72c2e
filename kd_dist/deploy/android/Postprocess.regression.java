package dev.kd_dist.student;

import java.util.LinkedHashMap;
import java.util.Map;

/** What the student's output says. Plain Java 8, without Android; safe to call from any thread. */
public final class Postprocess {
    private Postprocess() {}

    /** The student's values, which are final and within StudentInfo.OUTPUT_RANGE, by their names. */
    public static Map<String, Float> byName(float[] values) {
        Map<String, Float> named = new LinkedHashMap<>();
        for (int i = 0; i < values.length; i++) {
            named.put(StudentInfo.OUTPUT_NAMES[i], values[i]);
        }
        return named;
    }
}
