package dev.kd_dist.student;

import android.content.Context;
import java.io.File;
import java.io.FileOutputStream;
import java.io.IOException;
import java.io.InputStream;
import java.io.OutputStream;

/** An asset of the app as a file, for libraries that read no assets. */
final class AssetFile {
    private AssetFile() {}

    /**
     * The path of the asset `name`, which is copied to the app's own files unless it was before; another model has
     * another `sha256`.
     */
    static String path(Context context, String name, String sha256) throws IOException {
        File file = new File(context.getFilesDir(), sha256 + "-" + name);
        if (!file.exists()) {
            File part = new File(context.getFilesDir(), file.getName() + ".part");
            try (InputStream from = context.getAssets().open(name);
                    OutputStream to = new FileOutputStream(part)) {
                byte[] buffer = new byte[1 << 16];
                for (int read = from.read(buffer); read >= 0; read = from.read(buffer)) {
                    to.write(buffer, 0, read);
                }
            }
            if (!part.renameTo(file)) {
                throw new IOException(part + " cannot be renamed to " + file);
            }
        }
        return file.getPath();
    }
}
